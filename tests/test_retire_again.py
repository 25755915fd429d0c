"""Retired, gone back, and retired again: in whatever order, Alembic comes to its head, and the balances stay."""

from __future__ import annotations

from decimal import Decimal
from pathlib import Path

import pytest

import ledger
from retiring import ACT, End
from walletmigrate import retire as module
from walletmigrate.backfill import backfill
from walletmigrate.corrections import adjust
from walletmigrate.errors import PreconditionRefused
from walletmigrate.freeze import unfreeze
from walletmigrate.recalculate import recalculate
from walletmigrate.retire import reinstate

BALANCES = "select id, total_coins from public.users order by id"


@pytest.fixture
def end(database_url: str, tmp_path: Path) -> End:
    return End(database_url, tmp_path, with_promo=True, floor=Decimal(0))


def back(end: End) -> None:
    reinstate(end.engine, end.settings, ACT)
    ledger.set_phase(end.engine, "wallet_only")
    unfreeze(end.engine, end.settings, end.mapping, ACT)


def written(end: End) -> list[Path]:
    return sorted(end.migrations.glob("*_retire_balance_columns.py"))


@pytest.mark.parametrize("dropped", [False, True], ids=["before the drop", "after it"])
def test_after_a_way_back_the_migration_is_written_anew_in_its_place(end: End, dropped: bool) -> None:
    """A second one behind it would find no column to drop, and `alembic upgrade head` would fail."""
    end.freeze().archive()
    first = end.retire()
    if dropped:
        end.migrate()
        end.migrate("0001", down=True)
    back(end)
    with end.engine.begin() as connection:
        end.adapter().credit(connection, 1, 5, type="deposit")
    end.freeze()
    end.file.unlink()
    again = end.archive()
    second = end.retire()
    assert (second.revision, second.down_revision) == (first.revision, "0001")
    assert written(end) == [Path(first.migration)]
    assert again.sha256 in written(end)[0].read_text(encoding="utf-8")
    for _ in range(2):
        end.migrate()
        assert end.columns() == set()
        assert end.verify()
        end.migrate("0001", down=True)
        assert ledger.rows(end.engine, BALANCES)[0] == (1, 105)


def test_a_step_that_fails_leaves_the_earlier_migration_as_it_was(end: End, monkeypatch: pytest.MonkeyPatch) -> None:
    end.freeze().archive()
    end.retire()
    kept = written(end)[0].read_text(encoding="utf-8")
    back(end)
    end.freeze()
    end.file.unlink()
    end.archive()

    def fails(*_: object) -> None:
        raise RuntimeError("the guards")

    monkeypatch.setattr(module, "_put_up_guards", fails)
    with pytest.raises(RuntimeError, match="the guards"):
        end.retire()
    assert [one.read_text(encoding="utf-8") for one in written(end)] == [kept]


def test_a_revision_that_is_named_gets_a_migration_of_its_own(end: End) -> None:
    end.freeze().archive()
    first = end.retire()
    back(end)
    end.freeze()
    end.file.unlink()
    end.archive()
    second = end.retire(down_revision=first.revision)
    assert (second.down_revision, len(written(end))) == (first.revision, 2)


def test_retired_once_more_after_the_drop_there_is_nothing_to_write(end: End) -> None:
    end.freeze().archive()
    end.retire()
    end.migrate()
    with pytest.raises(PreconditionRefused, match="the column is dropped"):
        end.retire()
    assert len(written(end)) == 1


def test_after_the_drop_an_operator_corrects_and_recalculates_and_is_not_told_to_put_the_column_back(end: End) -> None:
    end.freeze().archive()
    end.retire()
    end.migrate()
    made = adjust(end.engine, end.settings, end.mapping, ACT, "1", Decimal(5))
    assert (made.outcome, end.balance(end.adapter(), 1)) == ("corrected", Decimal(105))
    ledger.execute(end.engine, "update wallet.accounts set balance = 7 where key = '2' and bucket = 'cash'")
    (mended,) = recalculate(end.engine, end.settings, end.mapping, ACT, account="2").items
    assert (mended.outcome, mended.legacy_before, mended.error) == ("recalculated", None, None)
    assert end.verify()
    with pytest.raises(PreconditionRefused) as refused:
        backfill(end.engine, end.settings, end.mapping, ACT)
    assert [what for what, _ in refused.value.reasons] == [
        "the phase is retired: there is no legacy column to open accounts from"
    ]
