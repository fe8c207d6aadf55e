"""The one timer, and the comparison of every backend with the reference and with softmax attention."""
