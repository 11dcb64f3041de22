"""What a model or a row could write to run something in whoever looks at it, to load something, or to deceive.

Each text that would run sets `document.title` to OWNED; each that would load asks for http://hostile.invalid/.
"""

OWNED = "owned"
LOADS = "http://hostile.invalid/"
_RUN = f"document.title='{OWNED}'"

HOSTILE = (
    f"<script>{_RUN}</script>",
    f"</script><script>{_RUN}</script>",
    f'</script></body></html><script>{_RUN}</script><!--"',
    f"<!--<script>{_RUN}</script>-->",
    "<!-- <script> -->",
    "-->",
    f'<img src=x onerror="{_RUN}">',
    f'<img src="{LOADS}1.png" onload="{_RUN}"><iframe src="{LOADS}2"></iframe><link rel=stylesheet href={LOADS}3.css>',
    f'"><svg onload="{_RUN}"><style>@import url({LOADS}4.css); * {{ background: url({LOADS}5.png) }}</style>',
    f"'-{_RUN}-' \"+{_RUN}+\" `${{{_RUN}}}` {{{{constructor.constructor('{_RUN}')()}}}}",
    f"javascript:{_RUN}",
    f"[click](javascript:{_RUN}) ![image]({LOADS}6.png) <{LOADS}7>",
    f"\\u003cscript\\u003e{_RUN}\\u003c/script\\u003e &lt;script&gt;{_RUN}&lt;/script&gt;",
    f'<a href="data:text/html,<script>{_RUN}</script>">x</a>',
    f"<base href='{LOADS}'><meta http-equiv=refresh content='0;{LOADS}8'><form action={LOADS}9><button autofocus>",
    "half \ud83d and the other \udcff, NUL \x00, \x1b[31mred\x1b[0m, \x07\x08\x7f\x9b",
    "user\u202etxt.exe\u202c \u2066hidden\u2069 zero\u200bwidth \ufeff\u00ad\u2060 \U000e0041\U000e0042",
    "lines\u2028and\u2029more\x85end\r\n\ttab",
    "__proto__ constructor toString",
)
