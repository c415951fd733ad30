"""The channel rules of the operations, by what they do with channels; `secateur.graph.rules` is the table of them."""
