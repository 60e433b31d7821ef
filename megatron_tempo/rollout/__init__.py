"""Rollouts: engines that generate responses, and the collection and verification of the responses."""
