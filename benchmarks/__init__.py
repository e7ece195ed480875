"""Measurements that anyone can repeat: `make bench`, or one script at a time (see README.md here)."""
