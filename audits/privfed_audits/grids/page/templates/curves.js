// Draws the figures and lets the boxes above choose what they and the tables show. Nothing here loads anything.
(() => {
  "use strict";
  const figures = JSON.parse(document.getElementById("figures").textContent);
  const boxes = [...document.querySelectorAll("fieldset[data-axis]")];
  const setting = document.getElementById("setting");
  const dark = matchMedia("(prefers-color-scheme: dark)");

  const wanted = () => Object.fromEntries(
    boxes.map(group => [group.dataset.axis, new Set([...group.querySelectorAll("input:checked")].map(i => i.value))]));
  const fits = (place, on) => Object.entries(on).every(([axis, labels]) => !(axis in place) || labels.has(place[axis]));

  const themed = printing => {
    const style = getComputedStyle(document.documentElement);
    const of = name => style.getPropertyValue(name).trim();
    const [ink, muted, line] = printing ? ["#000", "#444", "#ccc"] : [of("--ink"), of("--muted"), of("--line")];
    const look = {"modebar.bgcolor": "rgba(0,0,0,0)", "modebar.color": line, "modebar.activecolor": muted, "font.color": ink, "font.family": getComputedStyle(document.body).fontFamily, "font.size": 12.5,
      paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)"};
    for (const axis of ["xaxis", "yaxis"]) {
      Object.assign(look, {[`${axis}.gridcolor`]: line, [`${axis}.zerolinecolor`]: line, [`${axis}.linecolor`]: line,
        [`${axis}.tickcolor`]: line, [`${axis}.title.font.color`]: muted});
    }
    return look;
  };

  const base = {showlegend: false, autosize: true, margin: {l: 58, r: 14, t: 30, b: 48}, hovermode: "closest",
    hoverlabel: {align: "left"}};
  const config = {responsive: true, displaylogo: false, displayModeBar: matchMedia("(hover: hover)").matches && innerWidth > 560, modeBarButtonsToRemove: ["select2d", "lasso2d", "autoScale2d"],
    toImageButtonOptions: {format: "svg"}};

  const apply = () => {
    const on = wanted();
    if (setting) {
      for (const option of setting.options) option.hidden = !fits(option.dataset, on);
      if (setting.selectedOptions[0]?.hidden) setting.value = [...setting.options].find(o => !o.hidden)?.value ?? "";
    }
    for (const [name, figure] of Object.entries(figures)) {
      const shown = figure.data.map(({meta}) =>
        !meta || (fits(meta, on) && (!meta.setting || meta.setting === setting.value)));
      Plotly.restyle(`plot-${name}`, {visible: shown});
    }
    let rows = 0;
    for (const row of document.querySelectorAll("[data-place]")) {
      row.hidden = !fits(JSON.parse(row.dataset.place), on);
      if (row.dataset.kind === "cell" && !row.hidden) rows += 1;
    }
    document.getElementById("shown").textContent = rows;
    document.body.dataset.shown = rows;
  };

  const dress = printing => {
    for (const name of Object.keys(figures)) Plotly.relayout(`plot-${name}`, themed(printing));
  };

  for (const [name, figure] of Object.entries(figures)) {
    Plotly.newPlot(`plot-${name}`, figure.data, {...base, ...figure.layout}, config);
  }
  dress(false);
  dark.addEventListener("change", () => dress(false));
  addEventListener("beforeprint", () => dress(true));
  addEventListener("afterprint", () => dress(false));
  document.querySelector(".filters")?.addEventListener("change", apply);
  document.getElementById("all")?.addEventListener("click", () => {
    for (const box of document.querySelectorAll(".filters input")) box.checked = true;
    apply();
  });
  setting?.addEventListener("change", apply);
  if (innerWidth <= 560) document.querySelector(".filters details")?.removeAttribute("open");
  apply();
  document.body.dataset.ready = "yes";
})();
