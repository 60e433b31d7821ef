"""Prompts: the loaders of labelled and unlabelled files, and the resumable streams that training draws from."""
