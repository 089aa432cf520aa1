from __future__ import annotations

import subprocess
import sys

import pytest

from llgbm.probes import Probe, ProbeSet, create_domain_probes, create_generic_probes
from llgbm.runtime import UserError


def test_importing_probes_loads_no_torch() -> None:
    code = (
        "import sys; from llgbm.probes import create_domain_probes, create_generic_probes;"
        "create_generic_probes(); create_domain_probes('math').hash;"
        "print([m for m in ('torch', 'transformers', 'peft') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_generic_probes_are_five_templates_read_at_their_last_token() -> None:
    probes = create_generic_probes()
    texts = [probe.prompt for probe in probes.of("any task")]
    assert len(texts) == len(set(texts)) == 5 and probes.scope == "shared"
    assert all(text.strip() and "{" not in text for text in texts)
    assert all(probe.continuation is None for probe in probes.of("shared"))


def test_domain_probes_are_known_ones_or_the_prompts_given() -> None:
    sets = [create_domain_probes(domain) for domain in ("math", "code", "commonsense")]
    assert len({s.hash for s in sets}) == 3 and all(len(s.of("shared")) >= 3 for s in sets)
    assert [p.prompt for p in create_domain_probes("own", ["a", "b"]).of("shared")] == ["a", "b"]
    with pytest.raises(UserError, match="'own'; there are: math, code, commonsense"):
        create_domain_probes("own")


def test_probe_sets_cannot_be_empty_and_know_their_owners() -> None:
    for probes in ({}, {"one": ()}, {"one": (Probe("a"),), "two": ()}):
        with pytest.raises(ValueError, match="is empty"):
            ProbeSet.trajectories(probes)
    with pytest.raises(ValueError, match="one entry 'shared'"):
        ProbeSet("x", "shared", {"task": (Probe("a"),)})
    own = ProbeSet.trajectories({"one": [Probe("a", " b")]})
    assert own.of("one") == (Probe("a", " b"),)
    with pytest.raises(KeyError):
        own.of("two")


def test_hash_follows_every_part_of_a_set() -> None:
    sets = [
        ProbeSet.shared("x", ["a", "b"]),
        ProbeSet.shared("y", ["a", "b"]),
        ProbeSet.shared("x", ["b", "a"]),
        ProbeSet.shared("x", ["ab"]),
        ProbeSet.trajectories({"one": [Probe("a", " b")]}),
        ProbeSet.trajectories({"one": [Probe("a", "")]}),
        ProbeSet.trajectories({"one": [Probe("a")]}),
        ProbeSet.trajectories({"two": [Probe("a")]}),
    ]
    assert len({s.hash for s in sets}) == len(sets)
    assert ProbeSet.shared("x", ["a", "b"]).hash == sets[0].hash
