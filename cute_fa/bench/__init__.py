"""How fast attention is on a GPU, side by side with other libraries; and what a launch costs."""
