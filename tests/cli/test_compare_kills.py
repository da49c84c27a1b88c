"""``compare`` killed anywhere ends as if it had not been: no run is lost or made twice, and no process is left."""

import json
import random
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from command_line import CommandLine
from comparisons import compare, runs, succeed, table, unmeasured
from test_sweep import processes_of, soon_none

pytestmark = pytest.mark.slow

KILL = """
import itertools, multiprocessing, os, signal, threading
from mp_lightning.compare import calibration, classifier, comparison, conclusion, examine, pool, report, store
def kill():
    os.kill(os.getpid(), signal.SIGKILL)
def kill_at(place, name, nth, late=False):
    original, count = getattr(place, name), itertools.count(1)
    def patched(*args, **kwargs):
        now = next(count) == nth
        if now and not late:
            kill()
        result = original(*args, **kwargs)
        if now:
            kill()
        return result
    setattr(place, name, patched)
"""
# The half of a row reaches the disk.
IN_A_ROW = """
write, count = store.Store._write, itertools.count(1)
def half(self, row):
    before = self._path.stat().st_size if self._path.exists() else 0
    write(self, row)
    if next(count) == {}:
        os.truncate(self._path, (before + self._path.stat().st_size) // 2)
        kill()
store.Store._write = half
"""
AT_A_MOMENT = """
start = classifier.Classifier.configure_optimizers
def starting(self):
    threading.Timer({}, kill).start()  # seconds
    return start(self)
classifier.Classifier.configure_optimizers = starting
"""
# By name, code that kills the process in the n-th passage of one place.
PLACES: dict[str, Callable[[int], str]] = {
    "before a run is kept": lambda n: f"kill_at(store.Store, 'append', {n})",
    "before details are written": lambda n: f"kill_at(store, 'write_json', {n})",
    "between details and row": lambda n: f"kill_at(store.Store, '_write', {n})",
    "in the middle of a row": lambda n: IN_A_ROW.format(n),
    "after a row": lambda n: f"kill_at(store.Store, '_write', {n}, late=True)",
    "in training": lambda n: f"kill_at(classifier.Classifier, 'training_step', {3 * n})",
    "while the test images are classified": lambda n: f"kill_at(examine, 'scores', {n})",
}
CALIBRATION = {
    "in the pilot run of the controls": "kill_at(classifier.Classifier, 'training_step', 3)",
    "while moments are measured": "kill_at(calibration, 'site_moments', 1)",
    "before moments are written": "kill_at(calibration, 'write_json', 1)",
    "after moments are written": "kill_at(calibration, 'write_json', 1, late=True)",
}
REPORT = {
    "before the verdict": "kill_at(conclusion, 'summarize', 1)",
    "while pictures are drawn": "kill_at(report, 'write_png', 2)",
    "between the files of the report": "kill_at(report, 'write_whole', 2, late=True)",
    "before the page is in its place": "kill_at(report, 'page', 1, late=True)",
}
IN_PROCESSES = {
    "while processes start": "threading.Timer(0.3, kill).start()",
    "while processes train": "kill_at(comparison.Store, 'append', 2)",
}
MIDDLE = 10
WORDS = ["seeds=4"]
ROWS = 4 * 4


def killings() -> list[tuple[str, str]]:
    """Eighteen of them in one process, drawn with a seed, in the order of the stages that they are for."""
    draw = random.Random(5)
    places = [*PLACES, *draw.choices(list(PLACES), k=MIDDLE - 2 - len(PLACES))]
    middle = [(place, PLACES[place](draw.randint(1, 2))) for place in places]
    middle += [(f"after {moment} seconds", AT_A_MOMENT.format(moment)) for moment in (0.02, 0.07)]
    draw.shuffle(middle)
    return [*CALIBRATION.items(), *middle, *REPORT.items()]


@pytest.fixture(scope="module")
def uninterrupted(mp: CommandLine, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("uninterrupted")
    succeed(mp, folder, *WORDS)
    scores = {row["arm"]: row["nll"] for row in table(folder / "run" / "results.csv") if row["seed"] == "0"}
    assert len(set(scores.values())) == len(scores) > 2, "each arm acts"
    return folder / "run"


@pytest.mark.timeout(400)
def test_killed_twenty_times_ends_as_if_it_had_not_been(mp: CommandLine, uninterrupted: Path, tmp_path: Path) -> None:
    run, finished = tmp_path / "run", []
    plans = [(what, code, []) for what, code in killings()]
    in_processes = [(what, code, ["jobs=2"]) for what, code in IN_PROCESSES.items()]
    # Tuning is finished by then, so that processes are started once.
    plans[-len(REPORT) - 1 : -len(REPORT) - 1] = in_processes
    assert len(plans) == 20
    for what, code, words in plans:
        mark = [{"MARK": str(tmp_path)}]
        done = compare(mp, tmp_path, *WORDS, *words, first=f"{KILL}\n{code}", environments=mark)
        assert done.code == -signal.SIGKILL, f"{what}: {done.code}\n{done.stdout}\n{done.stderr}"
        assert soon_none(lambda: processes_of(tmp_path)), f"{what}: processes are left"
        finished.append(whole_rows(run / "tuning.csv") + whole_rows(run / "results.csv"))
    assert finished == sorted(finished) and finished[3] == 0 and finished[-1] == ROWS + 2, finished
    assert len(set(finished)) > 6, finished
    succeed(mp, tmp_path, *WORDS)
    assert_same(run, uninterrupted)


def whole_rows(path: Path) -> int:
    """How many rows of a CSV file are not cut off."""
    return max(0, path.read_bytes().count(b"\n") - 1) if path.exists() else 0


def assert_same(run: Path, expected: Path) -> None:
    """Each run once, with the same result, and a whole report of all of them."""
    for name in ("results.csv", "tuning.csv"):
        assert unmeasured(run / name) == unmeasured(expected / name), name
    assert len(runs(run)) == len(set(runs(run))) == ROWS
    assert len(list((run / "details").iterdir())) == ROWS + 2
    moments = [json.loads(next(path.glob("moments-*.json")).read_text()) for path in (run, expected)]
    assert moments[0] == moments[1]
    summary, its = (json.loads((path / "summary.json").read_text()) for path in (run, expected))
    assert summary["repeat"]["runs"] == ROWS
    for kept in (summary, its):
        del kept["repeat"]["command"], kept["repeat"]["date"]
    assert without_measured(summary) == without_measured(its)
    assert (run / "report.html").read_text().rstrip().endswith("</html>")
    assert not list(run.rglob("*.partial"))


def without_measured(value: object) -> object:
    """Plain values without the estimates of time."""
    if isinstance(value, dict):
        return {k: without_measured(v) for k, v in value.items() if k not in ("step_ms", "memory_mb")}
    return [without_measured(inner) for inner in value] if isinstance(value, list) else value


WITHOUT_TUNING = ["arms=[none,metaperturb]", "seeds=20"]
# Where to send a signal to, in place of this process: a process of the pool, or, as a terminal does, all of the group.
A_CHILD = "kill = lambda: os.kill(multiprocessing.active_children()[0].pid, signal.SIGKILL)"
CTRL_C = "kill = lambda: os.killpg(0, signal.SIGINT)"
# First to those processes alone that are just starting, which must not answer it.
CTRL_C_AT_THE_START = """
wait, count = pool.wait, itertools.count(1)
def waiting(*args, **kwargs):
    number = next(count)
    if number == 3:
        for process in multiprocessing.active_children():
            os.kill(process.pid, signal.SIGINT)
    if number == 10:
        os.killpg(0, signal.SIGINT)
    return wait(*args, **kwargs)
pool.wait = waiting
"""


@pytest.mark.timeout(200)
@pytest.mark.parametrize(
    ("jobs", "code", "exit_code", "line"),
    [
        (
            2,
            f"{A_CHILD}\nkill_at(store.Store, 'append', 2)",
            2,
            "a process of the comparison ended by itself",
        ),
        (1, f"{CTRL_C}\nkill_at(classifier.Classifier, 'training_step', 12)", 130, "interrupted; the same command"),
        (2, f"{CTRL_C}\nkill_at(store.Store, 'append', 2)", 130, "interrupted; the same command"),
        (2, CTRL_C_AT_THE_START, 130, "interrupted; the same command"),
    ],
    ids=["a process is killed", "interrupted", "processes interrupted", "starting processes interrupted"],
)
def test_what_ends_it_early_is_one_line_and_the_same_command_continues(
    mp: CommandLine, tmp_path: Path, jobs: int, code: str, exit_code: int, line: str
) -> None:
    started = time.monotonic()
    words, mark = [*WITHOUT_TUNING, f"jobs={jobs}"], [{"MARK": str(tmp_path)}]
    done = compare(mp, tmp_path, *words, first=f"{KILL}\n{code}", environments=mark)
    assert done.code == exit_code and len(done.stderr.splitlines()) == 1, done
    assert done.stderr.startswith(f"mp_lightning: {line}") and "the same command continues" in done.stderr
    assert soon_none(lambda: processes_of(tmp_path))
    before = runs(tmp_path / "run")
    assert len(before) < 20, f"it went on for {time.monotonic() - started:.0f} seconds"
    succeed(mp, tmp_path, *words, "seeds=2", "jobs=1")
    after = runs(tmp_path / "run")
    assert after[: len(before)] == before and len(after) == len(set(after))
    assert set(after) >= {(arm, seed) for arm in ("none", "metaperturb") for seed in (0, 1)}
