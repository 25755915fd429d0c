"""Every guard of the SQL, taken away one at a time: each is missed by a test (see CONTRIBUTING.md)."""
