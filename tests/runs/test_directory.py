"""A run directory appears whole or not at all."""

import threading
import time

import pytest
from kits.writers import file_size_limit

from sqs_pyro.errors import DataError, OutputError, ResourceError
from sqs_pyro.runs.directory import (
    BLOCKS,
    CHECKPOINT,
    METRICS,
    RECIPE,
    check_output,
    in_turn,
    partial_directory,
    read_run,
    run_directory,
)
from sqs_pyro.runs.seal import SUMS, check_sealed


def _finish(final, text="recipe: 1\n", *, overwrite=False, metrics="{}"):
    with run_directory(final, text, overwrite=overwrite) as partial:
        (partial / METRICS).write_text(metrics)


def _interrupt(final, text="recipe: 1\n", *, error=KeyboardInterrupt, checkpoint=True, overwrite=False):
    with pytest.raises(error), run_directory(final, text, overwrite=overwrite) as partial:
        if checkpoint:
            (partial / CHECKPOINT).write_bytes(b"state")
        raise error("stop")


def test_a_finished_run_has_its_final_name_and_no_leftovers(tmp_path):
    final = tmp_path / "new" / "run"
    with run_directory(final, "recipe: 1\n", overwrite=False) as partial:
        assert not final.exists()
        (partial / METRICS).write_text("{}")
        (partial / CHECKPOINT).write_bytes(b"state")
    assert sorted(path.name for path in final.iterdir()) == [SUMS, METRICS, RECIPE]
    assert [path.name for path in final.parent.iterdir()] == ["run"]


def test_an_error_of_the_input_leaves_nothing(tmp_path):
    _interrupt(tmp_path / "run", error=DataError)
    assert not list(tmp_path.iterdir())


def test_an_error_keeps_the_blocks_that_are_finished(tmp_path):
    final = tmp_path / "run"
    with pytest.raises(DataError), run_directory(final, "recipe: 1\n", overwrite=False) as partial:
        (partial / BLOCKS).mkdir()
        (partial / BLOCKS / "block-000.pt").write_bytes(b"hours")
        raise DataError("stop")
    with run_directory(final, "recipe: 1\n", overwrite=False) as partial:
        assert (partial / BLOCKS / "block-000.pt").read_bytes() == b"hours"


@pytest.mark.parametrize("error", [KeyboardInterrupt, MemoryError])
def test_an_interruption_keeps_the_checkpoint_for_the_same_recipe(tmp_path, error):
    final = tmp_path / "run"
    _interrupt(final, error=error)
    assert not final.exists()
    with run_directory(final, "recipe: 1\n", overwrite=False) as partial:
        assert (partial / CHECKPOINT).read_bytes() == b"state"


def test_an_interruption_before_the_first_checkpoint_leaves_nothing(tmp_path):
    _interrupt(tmp_path / "run", checkpoint=False)
    assert not list(tmp_path.iterdir())


def test_an_unfinished_run_of_another_recipe_is_not_lost_by_accident(tmp_path):
    final = tmp_path / "run"
    _interrupt(final)
    with pytest.raises(OutputError, match="holds an unfinished run of another recipe: finish it"):
        _finish(final, "recipe: 2\n")
    assert (partial_directory(final) / CHECKPOINT).exists()
    with run_directory(final, "recipe: 2\n", overwrite=True) as partial:
        assert not (partial / CHECKPOINT).exists()


def test_overwrite_replaces_a_finished_run_only_when_the_new_one_is_finished(tmp_path):
    final = tmp_path / "run"
    _finish(final, metrics="old")
    with pytest.raises(OutputError, match="already holds a finished run"):
        _finish(final)
    _interrupt(final, overwrite=True)
    assert (final / METRICS).read_text() == "old"
    _finish(final, overwrite=True, metrics="new")
    assert (final / METRICS).read_text() == "new"
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


@pytest.mark.parametrize("overwrite", [False, True])
def test_a_directory_that_is_no_run_is_never_touched(tmp_path, overwrite):
    precious = tmp_path / "thesis.tex"
    precious.write_text("years of work")
    with pytest.raises(OutputError, match="exists and is no run directory"):
        check_output(tmp_path, "", overwrite=overwrite)
    with pytest.raises(OutputError, match=r"cannot be made, because '.*thesis.tex' is a file"):
        check_output(precious / "run", "", overwrite=overwrite)
    assert precious.read_text() == "years of work"


def test_an_empty_directory_may_be_used(tmp_path):
    (tmp_path / "run").mkdir()
    _finish(tmp_path / "run")
    assert (tmp_path / "run" / METRICS).exists()


def test_two_processes_cannot_work_on_one_run(tmp_path):
    final = tmp_path / "run"
    with (
        run_directory(final, "recipe: 1\n", overwrite=False),
        pytest.raises(OutputError, match="in use by another process"),
        run_directory(final, "recipe: 1\n", overwrite=False),
    ):
        pass
    assert final.exists()


def test_bodies_of_one_lock_run_in_turn_and_leave_nothing(tmp_path):
    lock, inside, most = tmp_path / "baselines" / "net.lock", [], []

    def body():
        for _ in range(20):
            with in_turn(lock):
                inside.append(1)
                most.append(len(inside))
                time.sleep(0.0005)
                inside.pop()

    threads = [threading.Thread(target=body) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert most == [1] * 120
    assert list(lock.parent.iterdir()) == []


def test_a_lock_is_given_back_after_an_error(tmp_path):
    with pytest.raises(RuntimeError), in_turn(tmp_path / "lock"):
        raise RuntimeError
    with in_turn(tmp_path / "lock"):
        assert (tmp_path / "lock").exists()
    assert not (tmp_path / "lock").exists()


def test_no_room_keeps_the_checkpoint_and_so_does_a_refusal_of_it(tmp_path):
    final = tmp_path / "run"
    _interrupt(final, error=OutputError)
    for error in (DataError, OutputError, ResourceError):  # what was there before stays, whatever comes now
        _interrupt(final, error=error, checkpoint=False)
        assert (partial_directory(final) / CHECKPOINT).exists()
    _finish(final)
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


def test_a_file_of_somebody_else_in_a_run_is_not_replaced(tmp_path):
    final = tmp_path / "run"
    _finish(final)
    (final / "thesis.tex").write_text("years of work")
    with pytest.raises(OutputError, match=r"holds 'thesis\.tex', which no run wrote: move it away"):
        _finish(final, overwrite=True)
    assert (final / "thesis.tex").read_text() == "years of work"


@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize("beside", [None, RECIPE])
def test_what_has_the_name_of_an_unfinished_run_but_is_none_stays(beside, overwrite, tmp_path):
    final = tmp_path / "run"
    partial = partial_directory(final)
    (partial / "chapters").mkdir(parents=True)
    (partial / "chapters" / "thesis.tex").write_text("years of work")
    if beside:
        (partial / beside).write_text("recipe: 1\n")
    with pytest.raises(OutputError, match=r"holds 'chapters/thesis\.tex', which no run wrote: move it away"):
        _finish(final, overwrite=overwrite)
    assert (partial / "chapters" / "thesis.tex").read_text() == "years of work"
    partial.rename(tmp_path / "elsewhere")
    partial.symlink_to("elsewhere")
    with pytest.raises(OutputError, match="is a symbolic link: move it away"):
        _finish(final, overwrite=overwrite)
    assert (tmp_path / "elsewhere" / "chapters" / "thesis.tex").exists()


def test_an_unfinished_run_whose_recipe_is_no_text_is_one_of_another_recipe(tmp_path):
    final = tmp_path / "run"
    _interrupt(final)
    (partial_directory(final) / RECIPE).write_bytes(b"\xff\xfe\0")
    with pytest.raises(OutputError, match="an unfinished run of another recipe"):
        _finish(final)
    _finish(final, overwrite=True)


def test_a_run_of_an_older_version_is_replaced_with_all_that_it_wrote(tmp_path):
    final = tmp_path / "run"
    final.mkdir()
    for name in (METRICS, RECIPE, "packed.safetensors", "ensemble.safetensors", "history.csv", "bits.png"):
        (final / name).write_text("{}")
    _finish(final, overwrite=True)
    assert sorted(path.name for path in final.iterdir()) == [SUMS, METRICS, RECIPE]


def test_no_room_for_the_recipe_leaves_nothing(tmp_path):
    with file_size_limit(1), pytest.raises(OutputError, match="File too large"):
        _finish(tmp_path / "run")
    assert not list(tmp_path.iterdir())


def test_a_finished_run_that_was_altered_is_refused(tmp_path):
    final = tmp_path / "run"
    _finish(final, metrics='{"accuracy": 0.5}')
    check_sealed(final)
    for path in (final / METRICS, final / RECIPE, final / SUMS):
        whole = path.read_bytes()
        for i in range(len(whole)):
            path.write_bytes(whole[:i] + bytes([whole[i] ^ 1]) + whole[i + 1 :])
            with pytest.raises(OutputError, match=r"was altered after|is damaged|is missing"):
                check_sealed(final)
        path.write_bytes(whole)
    (final / METRICS).write_text('{"accuracy": 0.9}')
    with pytest.raises(OutputError, match=r"metrics\.json' was altered after it was written: put it back"):
        read_run(final)
