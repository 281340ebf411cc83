"""The Flower engine as a run sees it: where its data are, how its rounds' messages travel, and its end."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from privfed.config import RunConfig
from privfed.errors import ConfigError
from privfed.federation.engines.flower.fleet import Channel, Deadlines, Fleet
from privfed.federation.engines.flower.policy import unsupported
from privfed.federation.exchange import Connect
from privfed.federation.folder import RunFolder
from privfed.federation.material import Material
from privfed.federation.progress import Progress
from privfed.federation.setup import Stage
from privfed.federation.site_material import server_material
from privfed.federation.sites import Sites


@dataclass(slots=True, kw_only=True)
class FlowerEngine:
    """See the module.

    Attributes:
        sites: The roster.
        channel: Carries the messages.
        deadlines: How long to wait.
        log: Told every stage.
    """

    sites: Sites
    channel: Channel
    deadlines: Deadlines = field(default_factory=Deadlines)
    log: Callable[[Mapping[str, Any]], None] = lambda _record: None
    fleet: Fleet | None = field(default=None, init=False)

    def material(self, config: RunConfig) -> Material:
        """Return the server's data.

        Raises:
            ConfigError: If the run cannot be had over a network, or does not fit the roster.
        """
        reason = unsupported(config)
        if reason is not None:
            raise ConfigError(f"{reason}: leave it out, or use privfed train.")
        return server_material(config, self.sites)

    def start(
        self, config: RunConfig, folder: RunFolder, stages: Mapping[str, Stage], material: Material, watch: Progress
    ) -> Connect:
        """Have every site open the run; return what makes the exchange of each round.

        Raises:
            ConfigError: If a site refuses.
            RoundError: If a site is missing.
        """
        fleet = self.fleet = Fleet(
            config,
            self.sites,
            self.channel,
            run_id=folder.run_id,
            folder=folder.path,
            classes=material.dataset.label_names,
            deadlines=self.deadlines,
            watch=watch,
            log=self.log,
        )
        watch.message(f"Asking {len(self.sites.cards)} sites to open run {folder.run_id[:12]}")
        fleet.open({name: stage.phase.layout.digest for name, stage in stages.items()})
        return fleet.connect

    def finish(self) -> None:
        """Tell the sites that the run is over, so that they erase its keys."""
        if self.fleet is not None:
            self.fleet.close()
