"""Claims of chapters 10 and on that no cell proves: see test_claims.py."""
