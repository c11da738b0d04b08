"""Hyper-parameter search: a space of config keys (space), a study that many processes share (study), its trials (trials), its figures (show); the same for Ray
Tune (ray_tune)."""
