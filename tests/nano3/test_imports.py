"""What is kept from libraries while they are imported: modules, and the garbage collector."""

import colorsys
import gc
import subprocess
import sys

import pytest

from nano3.imports import hidden, uncollected


def test_a_hidden_module_cannot_be_imported_and_comes_back():
    before = colorsys
    with hidden("colorsys", "no_such_module"), pytest.raises(ImportError):
        import colorsys as again
    import colorsys as again

    assert again is before
    assert "no_such_module" not in sys.modules


def test_nothing_is_collected_within_and_what_was_made_is_not_looked_at_again():
    frozen = gc.get_freeze_count()
    with uncollected():
        assert not gc.isenabled()
        with uncollected():
            kept = [[number] for number in range(1000)]
        assert not gc.isenabled()  # the inner one found it off
    assert gc.isenabled()
    assert gc.get_freeze_count() >= frozen + len(kept)


def test_the_collector_is_on_again_after_an_error():
    with pytest.raises(ValueError, match="damaged"), uncollected():
        raise ValueError("damaged")
    assert gc.isenabled()


ENDS = """
import atexit, gc, sys
sys.path.insert(0, sys.argv[1])
from nano3.cli import UserError, run

def main():
    if sys.argv[2] == "error":
        raise UserError("no such file")

atexit.register(lambda: print(gc.isenabled(), gc.get_freeze_count() > 1000))
run(main)
"""


@pytest.mark.parametrize(("how", "code"), [("well", 0), ("error", 2)])
def test_a_script_ends_without_looking_at_all_objects_again(request, how, code):
    command = [sys.executable, "-c", ENDS, str(request.config.rootpath), how]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (code, "True True\n")
