"""A configuration's dress rehearsal: the real trainer, a rank of each kind, on a GPU that does nothing (nullgpu)."""
