"""Plans: crops, strides, batch sizes, epochs; how they are made and how they are read."""
