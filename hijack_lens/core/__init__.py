"""What all packages share: checks, inputs, files, tables, statistics, and the names of a circuit's parts."""
