"""Speed and memory, side by side with the naive form and with no loss at all, in one run."""
