#!/usr/bin/env bash
# Tests the adapters against the real packages: makes one virtual environment for each release of TransformerLens, once,
# and runs test_real_packages.py in those that have HookedTransformer, test_real_wrappers.py in all. Arguments go to
# pytest.
#
#     bash tests/interop/run.sh [-s] [-k name]
#
# EAPCORE_EAP_IG: a checkout of github.com/hannamw/EAP-IG, which is on no registry; without it its test is skipped.
# EAPCORE_INTEROP_ENVS: the folder of the environments, build/interop by default. An environment in it is used as it is.
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)
cd "$root"
environments=${EAPCORE_INTEROP_ENVS:-build/interop}
status=0
for release in 2.16 3.9 4; do
    environment=$environments/tl-$release
    if [ ! -x "$environment/bin/pytest" ]; then
        "${PYTHON:-python3}" -m venv "$environment"
        "$environment/bin/pip" install -q torch==2.13.0
        "$environment/bin/pip" install -q -r "tests/interop/environment-$release.txt"
    fi
    echo "== TransformerLens $release"
    files=(tests/interop/test_real_wrappers.py)
    [ "$release" = 4 ] || files+=(tests/interop/test_real_packages.py)
    PYTHONPATH="$root" EAPCORE_INTEROP_REQUIRED="$release" "$environment/bin/python" -m pytest "${files[@]}" "$@" || status=1
done
exit $status
