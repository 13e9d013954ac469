"""The part of the study of anchors that is on filters."""


def run_missing(runs, data, work, seeds):
    pass
