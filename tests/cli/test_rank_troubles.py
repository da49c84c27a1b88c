"""What goes wrong on one of several processes is said once, by all or by the first, and harms nothing."""

from pathlib import Path

import pytest
from command_line import CommandLine
from several_processes import TWENTY, assert_phi_close, assert_same_run, run, succeed

from mp_lightning.meta.checkpoint import checkpoints
from mp_lightning.perturbation import load_phi

pytestmark = pytest.mark.slow


NOT_FINITE = """
from mp_lightning.meta import learner
step = learner.Learner.step
def sometimes(self, number, watch=False):
    result = step(self, number, watch)
    return result._replace(valid_loss=result.valid_loss * float("nan")) if WHEN else result
learner.Learner.step = sometimes
"""


def test_a_task_that_diverges_ends_all_processes(mp: CommandLine, pictures: list[str], tmp_path: Path) -> None:
    code = NOT_FINITE.replace("WHEN", "self.task.name == 'few-b' and number == 3")
    first, second = run(mp, tmp_path, [*pictures, *TWENTY], 2, first={0: code, 1: code})
    assert first.code == second.code == 2 and second.stderr == ""
    (line,) = first.stderr.splitlines()
    assert line.startswith("mp_lightning: task 'few-b' diverged at meta-step 4: ") and "leave_out" in line
    done = succeed(mp, tmp_path, [*pictures, *TWENTY], 2)  # the checkpoint before it is as it should be
    assert_phi_close(done, succeed(mp, tmp_path / "alone", [*pictures, *TWENTY], 1))


def test_a_task_that_is_left_out_is_so_on_any_number_of_processes(
    mp: CommandLine, pictures: list[str], tmp_path: Path
) -> None:
    code = NOT_FINITE.replace("WHEN", "self.task.name in ('few-b', 'many-a') and number in (3, 9)")
    words = [*pictures, *TWENTY, "meta.on_divergence=leave_out"]
    runs = []
    for ranks in (1, 2):
        (tmp_path / str(ranks)).mkdir()
        first, *others = run(mp, tmp_path / str(ranks), words, ranks, first=dict.fromkeys(range(ranks), code))
        assert first.code == 0, first
        assert "tasks 'many-a', 'few-b' diverged at meta-step 4 and left this step's mean" in first.stdout
        assert "in so many of 20 steps: 'many-a' 2, 'few-b' 2." in first.stdout and "never counted" not in first.stdout
        card = load_phi(tmp_path / str(ranks) / "run" / "phi.safetensors").card
        left_out = {task["name"]: task["steps_left_out"] for task in card["tasks"]}
        assert left_out == {"many-a": 2, "many-b": 0, "few-a": 0, "few-b": 2}
        assert all((other.code, other.stdout) == (0, "") for other in others)
        runs.append(tmp_path / str(ranks) / "run")
    assert_same_run(runs[1], runs[0])


def test_processes_that_no_longer_hold_the_same_phi(mp: CommandLine, pictures: list[str], tmp_path: Path) -> None:
    drift = """
from mp_lightning.meta import module
step = module.JointMetaTraining.training_step
def drifting(self, batch, number):
    if self.meta_step == 5:
        self.perturbation.scale_weight.data[0] += 1e-7
    return step(self, batch, number)
module.JointMetaTraining.training_step = drifting
"""
    first, second = run(mp, tmp_path, [*pictures, *TWENTY], 2, first={1: drift})
    assert first.code == second.code == 2 and second.stderr == ""
    (line,) = first.stderr.splitlines()
    assert "after meta-step 6 phi is not the same on all processes" in line


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_full_disk_leaves_the_last_checkpoint(
    mp: CommandLine, pictures: list[str], tmp_path: Path, ranks: int
) -> None:
    """The system lets no file grow to the size of a checkpoint."""
    words = [*pictures, *TWENTY]
    run(mp, tmp_path, [*words, "+trainer.limit_train_batches=5"], ranks)
    (before, _) = checkpoints(tmp_path / "run" / "checkpoints")
    kept = before.read_bytes()
    limit = f"import resource; resource.setrlimit(resource.RLIMIT_FSIZE, ({len(kept) // 2}, {len(kept) // 2}))"
    first, *others = run(mp, tmp_path, words, ranks, first={0: limit})
    assert first.code == 2, first
    (line,) = first.stderr.splitlines()
    assert "cannot be written (File too large)" in line
    assert all((other.code, other.stderr) == (2, "") for other in others)
    assert before.read_bytes() == kept and not list(before.parent.glob("*.partial"))
    done = succeed(mp, tmp_path, words, ranks)
    assert_phi_close(done, succeed(mp, tmp_path / "alone", words, 1))


def test_a_damaged_checkpoint_is_passed_over_by_all_processes(
    mp: CommandLine, pictures: list[str], tmp_path: Path
) -> None:
    words = [*pictures, *TWENTY]
    run(mp, tmp_path, [*words, "+trainer.limit_train_batches=5"], 2)
    newest, older = checkpoints(tmp_path / "run" / "checkpoints")
    newest.write_bytes(newest.read_bytes()[:-1000])
    first, second = run(mp, tmp_path, words, 2)
    assert first.code == second.code == 0 and second.stdout == ""
    assert f"{newest.name}' is damaged and cannot be continued from; continuing from the one before" in first.stdout
    assert f"Continuing after meta-step {int(older.stem[-8:])} of this run" in first.stdout
    assert_phi_close(tmp_path / "run", succeed(mp, tmp_path / "alone", words, 1))
