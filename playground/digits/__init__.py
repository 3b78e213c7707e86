"""Questions about real scanned digits on small canvases: a dataset on which a LLaVA trains without a download."""
