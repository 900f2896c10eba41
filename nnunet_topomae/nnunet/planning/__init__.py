"""Plans: how they are made (crops, strides, batch sizes, epochs) and how they are read."""
