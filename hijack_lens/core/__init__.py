"""What all rooms share: checks, inputs, files, tables, statistics, and a circuit's words."""
