"""fsspec's S3, which takes no more of an answer than was asked for, as `ranged_http.py`."""

from typing import Any

from s3fs import S3FileSystem


class RangedS3(S3FileSystem):
    """Reads ranges [start, end), both given."""

    async def _cat_file(
        self, path: str, version_id: str | None = None, start: int | None = None, end: int | None = None, **options: Any
    ) -> bytes:
        if start is None or end is None:
            return await super()._cat_file(path, version_id=version_id, start=start, end=end, **options)
        bucket, key, version = self.split_path(path)
        named = {"VersionId": found} if (found := version_id or version) else {}
        response = await self._call_s3("get_object", Bucket=bucket, Key=key, Range=f"bytes={start}-{end - 1}", **named)
        async with response["Body"] as body:
            received = bytearray()
            while len(received) <= end - start and (piece := await body.read(end - start + 1 - len(received))):
                received += piece
        return bytes(received)
