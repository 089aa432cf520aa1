"""Identities from the command line, and where each other input that once failed is tried."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest
from helpers import ROOT, rows, write_rows
from output_checks import PROMPTS

from llgbm.__main__ import main
from llgbm.lora.adapters import LoraBatch, LoraSpec, adapter_config, save_adapter
from llgbm.models.load import Base
from tuning.run_ablation import main as ablation_main

# An input that once failed, and the test that tries it.
ELSEWHERE = {
    "--out . beside a thesis": "product/test_output_commands.py::test_into_the_current_folder_beside_others_files",
    "--out a training folder": "product/test_output_commands.py::test_a_training_folder_keeps_everything",
    "--out a mounted folder": "product/test_output_commands.py::test_a_mounted_folder_is_filled_in_place",
    "--out a link, ~/x": "product/test_output_commands.py::test_links_are_followed_and_the_home_is_expanded",
    "--out a long name": "product/test_output_commands.py::test_an_address_that_cannot_be_written_is_refused",
    "bank import .., --task ../../x": "product/test_output_banks.py::test_no_adapter_is_taken_over_to_a_place",
    "a bank inside its source": "product/test_output_banks.py::test_a_bank_inside_its_own_source_is_found_again",
    "eos_token edited": "llgbm/test_identity.py::test_every_file_that_numbers_depend_on",
    "an encoder's weights": "llgbm/test_provenance.py::test_a_generator_needs_the_encoder_that_it_was_trained",
    "a suite of one's own": "llgbm/test_identity.py::test_a_suite_of_the_users_has_an_id_of_its_own",
    "a bank built again": "llgbm/test_identity.py::test_a_bank_that_was_built_is_named_by_its_weights",
    "1 and 1.0": "llgbm/test_identity.py::test_one_number_has_one_id_however_it_is_written",
    "weights that lack a block": "llgbm/test_identity.py::test_weights_that_a_base_lacks_are_not_made_up",
    "resume with dropout": "llgbm/test_training_fields.py::test_a_resumed_run_with_dropout",
    "two pieces of four": "llgbm/test_training_fields.py::test_pieces_are_the_large_batch",
    "no and bf16 in one study": "llgbm/test_training_fields.py::test_precisions_follow_one_another",
    "dnd: its own bank": "dnd/test_dnd_banks.py::test_the_held_out_task_is_left_out_of_any_bank",
    "dnd: a second training": "product/test_output_commands.py::test_a_second_training_into_one_folder_is_refused",
    "dnd: its own file names": "dnd/test_dnd_banks.py::test_the_public_names_of_files_are_found",
    "TMPDIR too long or full": "tuning/test_places.py::test_a_folder_that_ray_cannot_use_is_one_sentence",
    "--address auto, dead": "tuning/test_places.py::test_auto_with_a_dead_cluster_ends_at_once",
    "fetch past a proxy": "llgbm/test_client.py::test_this_machine_is_reached_past_the_proxies",
    "MLFLOW_TRACKING_URI": "tuning/test_registry.py::test_the_store_can_come_from_the_environment_or_the_folder",
    "a folder renamed": "tuning/test_transfer.py::test_a_moved_or_copied_store_gives_the_same_report",
    "an odd locale": "tuning/test_places.py::test_any_locale_will_do",
    "core.autocrlf": "tuning/test_places.py::test_a_clone_with_crlf_has_none",
    "served: odd prompts": "tuning/test_served.py::test_a_wrong_request_gets_its_reason_in_the_message",
}


@pytest.mark.parametrize("name", ELSEWHERE)
def test_an_input_that_once_failed_has_its_test(name: str) -> None:
    file, _, test = ELSEWHERE[name].partition("::")
    assert f"def {test}" in (ROOT / "tests" / file).read_text()


CHANGES = {
    "alpha": (12.0, ()),
    "max-tokens": (6.0, ("--max-tokens", "3")),
    "trajectories": (6.0, ("--trajectories", "2")),
}


def imported(
    user: Path, base: Base, alpha: float, more: tuple[str, ...], spec: LoraSpec, adapters: LoraBatch
) -> None:
    """Take over adapters of three tasks, and print the trials that a sweep over them would have."""
    for task, state in zip(("river", "stone", "cloud"), adapters.to_state_dicts(), strict=True):
        own = user / "source" / task
        save_adapter(own, state, {**adapter_config(spec, base.path), "lora_alpha": alpha})
        (own / "prompts.json").write_text(json.dumps(PROMPTS))
    command = ["bank", "import", "source", "--base", base.path, "--out", "bank"]
    assert main([*command, "--trajectories", "1", "--max-tokens", "2", *more]) == 0
    plan = ["--base", base.path, "--data", "data", "--tasks", "river", "stone", "--bank", "bank"]
    assert ablation_main([*plan, "--held-out", "cloud", "--seeds", "0", "--dry-run"]) == 0
    for folder in ("source", "bank"):
        shutil.rmtree(user / folder)


@pytest.mark.parametrize("name", CHANGES)
def test_a_bank_of_other_settings_has_other_trials(
    name: str,
    tiny_base: Base,
    tiny_spec: LoraSpec,
    tiny_adapters: LoraBatch,
    user: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (user / "data").mkdir()
    for topic in ("river", "stone", "cloud"):
        write_rows(user / "data", topic, rows(topic, 32))
    alpha, more = CHANGES[name]
    found = []
    for setting in ((6.0, ()), (6.0, ()), (alpha, more)):
        imported(user, tiny_base, *setting, tiny_spec, tiny_adapters)
        lines = capsys.readouterr().out.splitlines()
        found.append({line.split()[0] for line in lines if re.match(r"[0-9a-f]{12} ", line)})
    assert found[0] == found[1] and len(found[0]) == 3 and not found[0] & found[2]
