"""A process that runs a mechanism on fixed sums, keeps its state in a file, and may kill itself on the way.

python killed_run.py FOLDER MECHANISM [ROUND MOMENT]
"""

from __future__ import annotations

import json
import os
import pickle
import signal
import sys
from pathlib import Path

import numpy as np

from privfed.privacy.ledger import Charge, Ledger
from privfed.privacy.mechanisms import MECHANISMS, Moment, Site, built
from privfed.privacy.plan import PhasePlan
from privfed.rng import PrivateStream

ROUNDS, SIZE = 6, 8


class Keeper:
    """A data holder that can die at a charge."""

    def __init__(self, ledger: Ledger, die: tuple[int, str] | None) -> None:
        self.ledger, self.die = ledger, die

    def stream(self, *names):
        return PrivateStream(bytes(32), *names)

    def charge(self, client_id, phase, round_number, input_digest, event):
        die(self.die, round_number, "before the charge")
        self.ledger.charge(
            Charge(
                run_id="r",
                data_digest="d",
                partition_digest="p",
                client_id=client_id,
                phase=phase,
                round=round_number,
                input_digest=input_digest,
                event=event,
            )
        )
        die(self.die, round_number, "after the charge")

    def recorded(self, client_id, phase, round_number):
        return self.ledger.first_input("r", client_id, phase, round_number)


def die(wanted: tuple[int, str] | None, round_number: int, moment: str) -> None:
    if wanted == (round_number, moment):
        os.kill(os.getpid(), signal.SIGKILL)


def main() -> None:
    folder, name = Path(sys.argv[1]), sys.argv[2]
    wanted = (int(sys.argv[3]), sys.argv[4]) if len(sys.argv) > 3 else None
    phase = PhasePlan(name="train", rounds=ROUNDS, cohort_size=20, clients=100, local_steps=1, probabilities={"*": 1.0})
    site = Site(
        plan=phase,
        noise_multiplier=1.0,
        relation="add_or_remove_one",
        l2_clip_norm=1.0,
        largest_clip=None,
        size=SIZE,
        bound=lambda clip, length: clip,
        seed=0,
    )
    work = built(MECHANISMS.get(name).config()).at_work(site)
    state = folder / "state"
    done, memory, params = pickle.loads(state.read_bytes()) if state.exists() else (0, {}, np.zeros(SIZE))
    with Ledger.open(folder / "ledger.sqlite") as ledger:
        keeper = Keeper(ledger, wanted)
        for number in range(done + 1, ROUNDS + 1):
            sum_M = np.full(SIZE + work.extra, 0.1 * number) - 0.01 * params.mean()  # depends on what was released
            moment = Moment(phase="train", round=number, broadcast=params.tobytes())
            found = work.release(sum_M, moment, keeper, memory)
            die(wanted, number, "after the release")
            memory, params = found.memory, params + found.mean_D
            state.with_suffix(".new").write_bytes(pickle.dumps((number, dict(memory), params)))
            state.with_suffix(".new").replace(state)
        steps = sum(entry.charge.event.steps for entry in ledger.entries())
        print(json.dumps({"params": params.tobytes().hex(), "entries": len(ledger.entries()), "steps": steps}))


if __name__ == "__main__":
    main()
