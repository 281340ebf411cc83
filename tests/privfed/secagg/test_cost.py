"""The formulas against sessions that really ran."""

from __future__ import annotations

from typing import Any

import pytest

from privfed.secagg import Requirements, SessionParams
from privfed.secagg.cost import Shape, client_work, grouped, server_work

UP = ("advertise", "share", "masked", "agree", "unmask")


def shape_of(params: SessionParams) -> Shape:
    return Shape(
        clients=len(params.clients),
        degree=params.degree,
        quorum=params.quorum,
        length=params.length,
        ring_bits=params.ring_bits,
    )


@pytest.mark.parametrize("ring_bits", [16, 20, 24, 32])
@pytest.mark.parametrize(("n", "degree"), [(3, 2), (9, 8), (20, 19), (21, 6)])
def test_bytes_are_exact_where_nobody_drops(
    make_params: Any, make_drive: Any, n: int, degree: int, ring_bits: int
) -> None:
    complete = degree == n - 1
    sparse: dict[str, Any] = {} if complete else {"degree": degree, "n_min": 11}
    params = make_params(n, None if complete else 4, 37, ring_bits=ring_bits, **sparse)
    drive = make_drive(params)
    drive.run()
    work = client_work(shape_of(params))
    sizes = {client: [0, 0] for client in params.clients}
    for (stage, client), message in drive.seen.items():
        sizes[client][stage not in UP] += len(message)
    assert set(map(tuple, sizes.values())) == {(work.bytes_up, work.bytes_down)}
    whole = server_work(shape_of(params))
    assert whole.bytes_up == n * work.bytes_up and whole.bytes_down == n * work.bytes_down


@pytest.mark.parametrize("gone", [0, 1, 3])
def test_keystream_of_a_complete_graph_is_exact(
    make_params: Any, make_drive: Any, monkeypatch: pytest.MonkeyPatch, gone: int
) -> None:
    """Counted where the cipher is called, on both sides."""
    from privfed.secagg import client, server

    counted = {"client": 0, "server": 0}

    def count(side: str, module: Any, name: str) -> None:
        real = getattr(module, name)

        def wrapped(values: Any, plus: Any, minus: Any, *rest: Any) -> Any:
            counted[side] += 4 * values.size * (len(plus) + len(minus))
            return real(values, plus, minus, *rest)

        monkeypatch.setattr(module, name, wrapped)

    count("client", client, "mask_packed")
    count("server", server, "apply_masks")
    params = make_params(10, 6, 100, ring_bits=24)
    make_drive(params, drops=dict.fromkeys(params.clients[:gone], 2)).run()
    assert counted["client"] == (10 - gone) * client_work(shape_of(params)).keystream_bytes
    assert counted["server"] == server_work(shape_of(params), gone / 10).keystream_bytes


def test_groups_multiply_the_server_and_leave_the_client() -> None:
    alone = grouped(50, 50, Requirements(), length=1000, ring_bits=24)
    million = grouped(1_000_000, 50, Requirements(), length=1000, ring_bits=24)
    assert alone.groups == 1 and million.groups == 20_000 and million.group == alone.group
    assert million.client == alone.client
    assert million.server.keystream_bytes == 20_000 * alone.server.keystream_bytes
    uneven = grouped(101, 50, Requirements(), length=10, ring_bits=32)
    assert uneven.groups == 3 and uneven.group.clients == 34


def test_a_sparse_graph_is_cheaper_than_the_complete_one() -> None:
    sparse = Shape.plan(200, Requirements(server="curious"), length=10_000, ring_bits=24)
    complete = Shape(clients=200, degree=199, quorum=sparse.quorum, length=10_000, ring_bits=24)
    assert client_work(sparse).keystream_bytes < 0.4 * client_work(complete).keystream_bytes
    assert server_work(sparse, 0.3).keystream_bytes < 0.5 * server_work(complete, 0.3).keystream_bytes


def test_the_overhead_beside_the_vector_is_what_is_said() -> None:
    shapes = [Shape(clients=n, degree=n - 1, quorum=n // 2 + 1, length=0, ring_bits=24) for n in (11, 51)]
    few, many = (client_work(shape).bytes_up for shape in shapes)
    assert (many - few) / 40 == pytest.approx(131, abs=1) and few - 131 * 10 < 540
