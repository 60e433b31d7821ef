"""Verifiers, which compare responses with answers. `verifiers.Verifiers` is the entry point."""
