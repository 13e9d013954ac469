"""Photon from Python: prepare text, train, look at what came out, go on.

    import photon

    photon.prepare({"news": "news/", "books": "books.jsonl.gz"}, "data/mine")
    run = photon.train(["data=prepared", "data.path=data/mine", "cohort=null"], run_dir="runs/mine")
    run.history.plot("tokens", "perplexity")

It does what the commands of the same names do. Runs of one process take turns, from whatever thread they are
started, since torch's settings are the process's. An interruption leaves a run; see `Run.resume`.
"""
