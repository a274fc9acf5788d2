"""Compile for TPUs and read the schedules that libtpu dumps."""
