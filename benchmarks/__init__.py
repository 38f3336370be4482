"""Speed of this project's V4 next to transformers' V4: same weights, same data, same process, taking turns."""
