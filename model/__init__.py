"""An exhaustive explorer of the protocol that keeps ledger and legacy equal. See README.md."""
