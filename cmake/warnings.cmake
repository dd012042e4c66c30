# Warnings of our own code are errors; SOCO_WERROR=OFF is the way out for a compiler newer than us.

option(SOCO_WERROR "Treat warnings in csrc/ as errors" ON)

function(soco_warnings target)
  set(host -Wall -Wextra -Wshadow -Wconversion -Wno-sign-conversion)
  set(device)
  if(SOCO_WERROR)
    list(APPEND host -Werror)
    set(device "SHELL:-Werror all-warnings")
  endif()
  list(JOIN host "," host_of_nvcc)
  target_compile_options(
    ${target}
    PRIVATE "$<$<COMPILE_LANGUAGE:CXX>:${host}>"
            "$<$<COMPILE_LANGUAGE:CUDA>:-Xcompiler=${host_of_nvcc}>"
            "$<$<COMPILE_LANGUAGE:CUDA>:${device}>")
endfunction()
