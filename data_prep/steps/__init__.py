"""Step-aware traces: problems as graphs of typed steps, and the text of a solution in four parts."""
