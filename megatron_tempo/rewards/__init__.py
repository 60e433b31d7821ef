"""Verifiers: who compares a response with an answer. `verifiers.Verifiers` is the way in."""
