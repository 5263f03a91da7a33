"""Devices as one mesh: where every array lies, and how several processes act as one."""
