"""Numbers to a table: what is refused, what is held out; and the closed form."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

from headwater.errors import DataError, UsageError
from headwater_recipes.data.errors import DataMissing
from headwater_recipes.linear import data, model
from headwater_recipes.linear.settings import LinearSettings
from headwater_recipes.tables import table as tables
from tests.recipes.data import need

CSV = "\ufeffroom, area,price\r\n" + "".join(f"{i},{i * i},{3 * i - 0.5 * i * i + 7}\r\n" for i in range(20))


def _settings(path: Path) -> LinearSettings:
    return LinearSettings(data=(str(path),))


def test_a_csv_file_is_a_table(tmp_path: Path) -> None:
    path = tmp_path / "rooms.csv"
    path.write_text(CSV, encoding="utf-8")
    table = data.read(_settings(path))
    assert (table.names, table.target) == (("room", "area"), "price")
    assert table.x[3].tolist() == [3, 9]
    assert table.y[3] == 11.5
    assert table.truth is None


def test_any_column_can_be_the_target(tmp_path: Path) -> None:
    path = tmp_path / "rooms.csv"
    path.write_text(CSV, encoding="utf-8")
    table = tables.read_csv(path, "area")
    assert (table.names, table.target) == (("room", "price"), "area")
    assert (table.x[3].tolist(), table.y[3]) == ([3, 11.5], 9)
    with pytest.raises(DataError, match="no column 'garden', but room, area, price; nothing"):
        tables.read_csv(path, "garden")


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("", "needs a row of names"),
        ("a,b\n", "needs a row of names"),
        ("a\n1\n2\n", "two columns or more"),
        ("1,2\n3,4\n5,6\n", "row 1: must be the names"),
        ("a,b\n1,2\n1,2,3\n", "row 3: 3 cells, not 2"),
        ("a,b\n1,2\n\n1,x\n", "row 4, column b: 'x' is no number"),
        ("a,b\n1,\n", "row 2, column b: '' is no number"),
        ("a,b\nnan,1\n", "column a: 'nan' is no number"),
        ('"a,b\n1,2\n3,4\n', "row 1: unexpected end of data"),
        ('a,b\n1,2\n"1"2,3\n', "row 3: ',' expected after"),
        ('a,b\n1,2\n"3,4\n5,6\n', "row 3: unexpected end of data"),
        ("a,a\n1,2\n", "row 1: two columns are called 'a'"),
    ],
)
def test_a_bad_file_is_told_by_row_and_column(text: str, told: str, tmp_path: Path) -> None:
    path = tmp_path / "bad.csv"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(DataError, match=f"{told}.*nothing was started"):
        data.read(_settings(path))


def test_what_is_no_file_is_told(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="cannot be read as a table"):
        data.read(_settings(tmp_path / "none.csv"))
    (tmp_path / "binary.csv").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(DataError, match="cannot be read as a table"):
        data.read(_settings(tmp_path / "binary.csv"))
    with pytest.raises(UsageError, match="give one table"):
        LinearSettings(data=("generated", "diabetes")).check()


def test_a_table_that_tells_nothing_is_refused() -> None:
    table = data.generated(60, 3, 1.0, 0)
    with pytest.raises(DataError, match="10 rows: of these 2 are held out, and 3 columns and 9 workers need 9"):
        tables.divide(data.generated(10, 3, 1.0, 0), 0, workers=9)
    with pytest.raises(DataError, match=r"6 rows: .* need 5 to train on"):
        tables.divide(data.generated(6, 3, 1.0, 0), 0, workers=1)
    table.x[:, 1] = 4
    with pytest.raises(DataError, match="column x2: the same in all rows"):
        tables.divide(table, 0, workers=1)
    table.y[:] = 4
    with pytest.raises(DataError, match="column x2, y: the same"):
        tables.divide(table, 0, workers=1)


def test_every_row_is_on_one_side_and_the_run_folder_keeps_them(tmp_path: Path) -> None:
    wanted = LinearSettings(rows=50, features=2)
    data.prepare(wanted, Console(quiet=True))(tmp_path)
    split, table = tables.Split.load(tmp_path), data.read(wanted)
    assert (len(split.training.y), len(split.held_out.y)) == (40, 10)
    assert sorted([*split.training.y, *split.held_out.y]) == sorted(table.y)
    assert split.training.truth is not None
    assert split.training.truth.tolist() == (table.truth.tolist() if table.truth is not None else None)
    assert tables.divide(table, 1, 1).held_out.y.tolist() != split.held_out.y.tolist()


def test_the_closed_form_finds_the_truth_within_its_errors() -> None:
    table = data.generated(2000, 5, 0.5, 3)
    assert table.truth is not None
    beta, constant, errors = model.closed_form(table)
    assert np.abs((beta - table.truth) / errors).max() < 4
    assert errors.max() < 0.05
    assert abs(constant - 3) < 0.05
    half = data.generated(8000, 5, 0.5, 3)
    assert 0.4 < (model.closed_form(half)[2] / errors).max() < 0.6  # four times the rows


def test_columns_that_say_the_same_have_a_closed_form_too() -> None:
    table = data.generated(200, 2, 0.1, 0)
    twice = tables.Numbers(np.column_stack([table.x, table.x[:, 0]]), table.y, ("a", "b", "c"), "y")
    beta, _, errors = model.closed_form(twice)
    assert beta[0] == pytest.approx(beta[2])
    assert np.isfinite(errors).all()


def test_diabetes_is_that_of_the_catalog(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    need("diabetes")
    table = data.diabetes()
    assert table.x.shape == (442, 10)
    assert table.x[0].tolist() == [59, 2, 32.1, 101, 157, 93.2, 38, 4, 4.8598, 87]  # as its file begins
    assert (table.y.min(), table.y.max()) == (25, 346)
    monkeypatch.setenv("HEADWATER_CACHE", str(tmp_path))
    with pytest.raises(DataMissing, match="Run: headwater data get diabetes"):
        data.diabetes()
