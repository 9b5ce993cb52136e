# shellcheck shell=bash
# What the operator sees: steps as lines, or collected and printed as JSON at the end.

# Why the last thing failed, in words.
# shellcheck disable=SC2034 # It is read by all others.
WHY=''
STEPS=()

# JSON of a text. What is not UTF-8 loses its bytes above 127.
json_string() {
    local text=$1 result='' character i
    if [[ $text == *[$'\x80'-$'\xff']* ]] && ! printf '%s' "$text" | iconv -f UTF-8 -t UTF-8 >/dev/null 2>&1; then
        text=${text//[$'\x80'-$'\xff']/?}
    fi
    text=${text//\\/\\\\}
    text=${text//\"/\\\"}
    if [[ $text == *[[:cntrl:]]* ]]; then
        for ((i = 0; i < ${#text}; i++)); do
            character=${text:i:1}
            if [[ $character == [[:cntrl:]] ]]; then printf -v character '\\u%04x' "'$character"; fi
            result+=$character
        done
        text=$result
    fi
    printf '"%s"' "$text"
}

# JSON of a number, or null.
json_number() {
    if [[ ${1-} =~ ^(0|[1-9][0-9]*)$ ]]; then printf '%s' "$1"; else printf 'null'; fi
}

# JSON of an array of values that are JSON already.
json_array() {
    local IFS=,
    printf '[%s]' "$*"
}

# JSON of an array of texts.
json_strings() {
    local text list=()
    for text in "$@"; do list+=("$(json_string "$text")"); done
    json_array "${list[@]}"
}

# step KIND ABOUT TEXT [REMEDY]: kinds are changed, would, unchanged, note, refused, failed.
step() {
    local kind=$1 about=$2 text=$3 remedy=${4-} object
    if ((JSON)); then
        object="{\"kind\":$(json_string "$kind"),\"about\":$(json_string "$about"),\"text\":$(json_string "$text")"
        if [[ -n $remedy ]]; then object+=",\"remedy\":$(json_string "$remedy")"; fi
        STEPS+=("$object}")
        return 0
    fi
    case $kind in
    refused | failed) printf '%s: %s: %s\n' "$about" "$kind" "$text" >&2 ;;
    would) printf '%s: would %s\n' "$about" "$text" ;;
    *) printf '%s: %s\n' "$about" "$text" ;;
    esac
    [[ -z $remedy ]] || printf '    what to do: %s\n' "$remedy" >&2
    return 0
}

# Ends the program, with the steps as JSON if that is wanted.
finish() {
    local status=$1 dry=false
    if ((JSON)) && [[ $COMMAND != status && $COMMAND != check || ${#STEPS[@]} != 0 ]]; then
        ((DRY_RUN)) && dry=true
        printf '{"command":%s,"dry_run":%s,"exit":%d,"steps":%s}\n' \
            "$(json_string "$COMMAND")" "$dry" "$status" "$(json_array "${STEPS[@]}")"
    fi
    exit "$status"
}
