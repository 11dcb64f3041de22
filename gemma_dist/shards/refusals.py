"""Why a store does not give or take a file, and what helps: none of it is a fault of the shards.

S3 names a code with each refusal (https://docs.aws.amazon.com/AmazonS3/latest/API/ErrorResponses.html, "List of error
codes"), which s3fs keeps as the cause of its own error; other stores say a status of HTTP.
"""

from collections.abc import Callable

CREDENTIALS = "look at AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY, AWS_PROFILE and AWS_ENDPOINT_URL"
CODES = {
    "NoSuchBucket": ("there is no such bucket", "check its name and AWS_ENDPOINT_URL"),
    "InvalidAccessKeyId": ("the store does not know these credentials", CREDENTIALS),
    "SignatureDoesNotMatch": ("the secret key does not belong to these credentials", CREDENTIALS),
    "InvalidToken": ("the store does not know these credentials' token", "renew AWS_SESSION_TOKEN"),
    "ExpiredToken": ("the credentials have expired", "renew them, such as by `aws sso login`"),
    "RequestTimeTooSkewed": ("this machine's clock is wrong", "set it, such as by `chronyc makestep`"),
    "AuthorizationHeaderMalformed": ("the bucket lies in another region", "set AWS_DEFAULT_REGION to it"),
    "AccessDenied": (
        "these credentials may not do that",
        "have s3:GetObject and s3:ListBucket allowed for it, and to write s3:PutObject",
    ),
}
KINDS = {  # errors by which clients say that they do not even ask
    "NoCredentialsError": ("no credentials were found", CREDENTIALS),
    "PartialCredentialsError": ("a part of the credentials is missing", CREDENTIALS),
    "ProfileNotFound": ("there is no such profile of credentials", "look at AWS_PROFILE"),
    "TokenRetrievalError": ("the credentials have expired", "renew them, such as by `aws sso login`"),
    "UnauthorizedSSOTokenError": ("the credentials have expired", "renew them, such as by `aws sso login`"),
    "DefaultCredentialsError": ("no credentials were found", "run `gcloud auth application-default login`"),
    "RefreshError": ("the credentials have expired", "run `gcloud auth application-default login`"),
}
STATUSES = {
    401: ("the server wants credentials", "give them, or sign the URL"),
    403: ("the server refuses", "check the credentials; a signed URL may have expired, and the file may not be there"),
}


def refusal(error: BaseException, ask_for_a_byte: Callable[[], object]) -> str | None:
    """Cause and remedy of an error that says no for good, in words; None for any other.

    Args:
        ask_for_a_byte: of the same file, with GET: the answer to HEAD, which often comes first, has no code.
    """
    found = _look(error)
    if found is None and _is_bare(error):
        try:
            ask_for_a_byte()
        except Exception as again:  # each file system has errors of its own
            found = _look(again)
    if found is None and isinstance(error, PermissionError):
        found = STATUSES[403]
    if found is None:
        return None
    cause, remedy = found
    said = str(error).strip()
    return f"{cause}{f' ({said})' if said else ''}; {remedy}"


def _look(error: BaseException) -> tuple[str, str] | None:
    """Cause and remedy, as far as the error itself or its cause say them."""
    for one in filter(None, (error, error.__cause__)):
        response = getattr(one, "response", None)
        code = response.get("Error", {}).get("Code") if isinstance(response, dict) else None
        status = getattr(one, "status", None) or getattr(one, "code", None)
        found = CODES.get(str(code)) or KINDS.get(type(one).__name__)
        if found or (found := STATUSES.get(status) if isinstance(status, int) else None):
            return found
    return None


def _is_bare(error: BaseException) -> bool:
    """Whether it has a status of HTTP in the place of a code."""
    response = getattr(error.__cause__, "response", None)
    return isinstance(response, dict) and str(response.get("Error", {}).get("Code")).isdigit()
