"""Compiles a step for chips that we do not have, and says what it would need and cost there."""
