"""The loader alone: how fast a recipe's data comes, how full its rows are, and what it costs in memory."""
