"""Explanations of examples of stored runs, which are computed on demand."""

from typing import Any

from holdfast.core.errors import TargetError, UsageError
from holdfast.io.models.factories import names_code
from holdfast.io.remote.remote import SCHEMES
from holdfast.runs.assess.result import Result
from holdfast.viewer.pages import Explain


def explainer(*, trust_code: bool = False) -> Explain:
    """Return the function that explains an example of a run as HTML.

    The address of the model is that of the run, which may come from someone else. Without `trust_code`, a model is
    therefore refused whose opening would run code or send requests. A model that changed since the run is refused, too.
    """

    def explain_example(result: Result, number: int) -> str:
        from holdfast.api.explain import explain  # opens models, which the other pages do not need
        from holdfast.api.verb_settings import Explain as ExplainSettings

        card = result.evidence.model
        name, folder = str(card.get("name", "")), str(result.run_folder)
        is_code = card.get("how") == "python" or names_code(name)
        is_remote = name.partition("://")[0] in SCHEMES
        if (is_code or is_remote) and not trust_code:
            raise UsageError(
                f"the model of the run is {name!r}; opening it would {'run code' if is_code else 'send requests'}. The "
                "page of the example shows what the run stores; if you trust the model, start holdfast ui with "
                "--trust-code"
            )
        if not is_code:
            return explain(folder, index=number).fragment(level=1)
        data: Any = result.evidence.data.get("name")
        if data is None:
            raise TargetError(
                f"the run {folder!r} does not name its data; use holdfast explain with the data"
            )
        settings = ExplainSettings(model=name, data=data, from_run=folder, index=number, trust_code=True)
        try:
            return settings.run().fragment(level=1)
        except UsageError as error:
            reason = error.on_command_line()
            raise UsageError(
                f"the model {name} and the data {data} cannot be opened without the options of the run, which its "
                f"folder does not state ({reason}); use holdfast explain {name} {data} with these options and "
                f"--from-run {folder} --index {number}"
            ) from error

    return explain_example
