"""States that the processes of a server share: clusters of queries, rates and budgets of principals."""
