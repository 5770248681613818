"""Gates: claims about a metric, judged on its interval. `grammar` reads them and needs no torch."""
