"""Docstrings of source files: all of them, wherever they are, in the order of the source."""

from __future__ import annotations

import gc
from pathlib import Path

from heapr.text.docstrings import docstrings

SOURCE = '''"""module"""
def plain():
    """plain"""
    def inner():
        """inner"""
if True:
    class A:
        """class"""
        async def method(self):
            """method"""
else:
    def other():
        """else"""
try:
    def tried():
        """try"""
except ValueError:
    def caught():
        """except"""
else:
    def fine():
        """try else"""
finally:
    def last():
        """finally"""
for _ in ():
    def each():
        """for"""
while False:
    def again():
        """while"""
with open("x"):
    def opened():
        """with"""
match 1:
    case 1:
        def one():
            """match"""
class B: "on one line"
def without(): pass
x = lambda: "no docstring"
"""text that is no docstring"""
'''
EXPECTED = (
    """module plain inner class method else try except try_else finally for while with match on_one_line"""
)


def test_docstrings_are_found_in_every_kind_of_block(tmp_path: Path) -> None:
    (tmp_path / "a.py").write_text(SOURCE)
    (tmp_path / "b.py").write_text('"""second file"""')
    (tmp_path / "c.py").write_text("{{ a template }}")
    (tmp_path / "test_d.py").write_text('"""a test"""')
    found = docstrings(tmp_path)
    assert [text.replace(" ", "_") for text in found] == [*EXPECTED.split(), "second_file"]
    assert gc.isenabled()
