"""Sources of labelled images, and the path from them to batches."""
