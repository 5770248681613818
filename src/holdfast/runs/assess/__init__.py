"""The steps of an assessment and of a certification."""
