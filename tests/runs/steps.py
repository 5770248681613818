"""The steps of a rotation, each called with a pool and the settings that its sets share."""

from holdfast.rotation.steps import admit as admission
from holdfast.rotation.steps import collect as collection
from holdfast.rotation.steps import draw as drawing
from holdfast.runs.engine.progress import ignore, silent


def create(path, common, *, resume=False):
    return collection.create_or_resume(collection.CollectRequest(path, common, resume))


def collect(pool, common, *, budget_s=None, notify=ignore, progress=silent):
    request = collection.CollectRequest(pool.path, common, True, budget_s)
    return collection.collect(request, notify=notify, progress=progress)


def train(pool, common, codec, diffusion):
    return drawing.train(drawing.TrainRequest(pool, common, codec, diffusion))


def draw(pool, common, sets=None, *, notify=ignore, **settings):
    return drawing.draw(drawing.DrawRequest(pool, common, sets, **settings), notify=notify)


def admit(pool, common, *, notify=ignore, **settings):
    return admission.admit(admission.AdmitRequest(pool, common, **settings), notify=notify)
