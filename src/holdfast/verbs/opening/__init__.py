"""The opening of models, data, guards and plans from settings, which several verbs share."""
