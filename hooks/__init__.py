"""Hook modules."""
