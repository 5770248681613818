"""What the pages of a server and those of stored runs have in common: the headers of responses, and the style sheet."""

from holdfast.reports.formats.html import template_text


def page_headers(style: str = "'self'") -> dict[str, str]:
    """Return the headers of a page without scripts. `style` is the source of its style sheet in a content security
    policy.
    """
    return {
        "content-security-policy": f"default-src 'none'; style-src {style}; img-src data:; form-action 'self'; "
        "base-uri 'none'; frame-ancestors 'none'",
        "x-content-type-options": "nosniff",
        "x-frame-options": "DENY",
        "referrer-policy": "no-referrer",
        "cache-control": "no-store",
    }


def style_sheet() -> str:
    """Return the style sheet of all pages, which begins with that of reports."""
    return template_text("report.css") + template_text("pages.css")
