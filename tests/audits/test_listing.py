"""``privfed ls attacks`` lists what is registered, and nothing is kept by hand."""

from __future__ import annotations

import json

from click.testing import CliRunner

from privfed.cli import main
from privfed_attacks.inversion import ATTACKS
from privfed_attacks.membership import MEMBERSHIP


def test_every_attack_is_listed_with_what_it_needs():
    result = CliRunner().invoke(main, ["ls", "attacks", "--json"])
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)["attacks"]
    assert list(found) == [*ATTACKS.names(), *MEMBERSHIP.names()]
    assert found["adapter_bins"].endswith("Finds images; malicious server.")
    assert found["loss"].endswith("Membership, from losses.")
    assert "reference members" in found["lira"]
    assert all(len(text) > 40 for text in found.values())


def test_they_are_in_the_whole_listing_too():
    found = json.loads(CliRunner().invoke(main, ["ls", "--json"]).stdout)
    assert {"tunings", "attacks"} <= set(found)
